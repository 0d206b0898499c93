"""OpenAI's routes, so that its own client works unchanged. What comes in is read by `requests`, what goes out is made by `shapes`."""
