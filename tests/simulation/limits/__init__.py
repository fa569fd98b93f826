"""A world of limiters alone: nodes that count, tell each other with delay and loss, are cut apart, die and come back."""
