"""Parameter-efficient fine-tuning: one file a method, one walk over the model for all
of them.
"""
