"""One file per method; importing this package registers them."""
