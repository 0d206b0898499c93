"""A relay that is blind: it carries bytes to nodes that asked it to, and knows neither prompt nor
answer.
"""
