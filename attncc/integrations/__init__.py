"""attncc inside other libraries, one module each; importing one of them needs that library."""
