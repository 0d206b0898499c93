"""Other OpenAI-compatible servers, whose models this node passes on."""
