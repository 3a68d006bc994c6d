"""The algorithm: stages, the executions that train them, and the rules of delayed gradients. It imports torch only."""
