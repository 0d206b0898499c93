"""Moving models: what a file is (`identify`), how it enters the store, and how it is pulled from wherever it can be had."""
