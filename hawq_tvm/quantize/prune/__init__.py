"""Float networks with fewer channels: what hangs together, what it costs, which go, what the rest learns."""
