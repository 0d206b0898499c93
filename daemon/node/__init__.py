"""The parts of a node, put together: groups with one lifecycle each, and how the whole is."""
