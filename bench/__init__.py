"""Speed, memory and compile time of attncc beside its peers: `python -m bench --list`."""
