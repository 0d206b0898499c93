"""What other nodes may ask of this one: the server, its ceilings, and the ways to another node's."""
