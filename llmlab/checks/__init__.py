"""What marks the exercises: `llmlab.checks.<part>.<topic>` holds the object `check` of
lesson `<part>/<topic>`.
"""
