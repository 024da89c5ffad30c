"""`python -m attncc.demo`: from one spec file to a checked kernel, then a pretrained model on attncc's attention."""
