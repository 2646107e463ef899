"""What all tests share."""

from llmlab.course.grammar import leave_out_grammar

leave_out_grammar()  # three seconds in each process that imports nbformat
