"""The one loop that trains every method, its optimisers, and the dry run before it."""
