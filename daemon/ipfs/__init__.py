"""The IPFS node: the only room that knows it is Kubo."""
