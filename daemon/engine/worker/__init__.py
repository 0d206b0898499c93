"""The child process of one model. Only here is llama.cpp loaded, and strangers' templates and schemas are worked on only here."""
