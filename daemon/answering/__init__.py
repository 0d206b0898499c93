"""Who answers a question: this node, another one, or a server that this node answers for."""
