"""Reading a host: small files below a replaceable root, and what they say about virtualization."""
