"""What nodes say to each other about themselves and their models."""
