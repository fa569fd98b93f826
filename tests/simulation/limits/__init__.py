"""A world of limiters alone: nodes that count, and tell each other what they counted with delay and loss."""
