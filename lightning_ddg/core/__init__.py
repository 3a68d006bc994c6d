"""The algorithm: stages, the executions that train them, and the rules of delayed gradients. It imports torch only.

Read in this order: ``schedule`` (who does what when), ``delay_line`` (the algorithm in one process), ``stage`` and
``stash`` (one stage, and its weight versions), ``pipeline`` (that stage among others), ``execution`` (the interfaces).
"""
