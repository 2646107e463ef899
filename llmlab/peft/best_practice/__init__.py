"""Which method to take: 14 methods compared by one rule.

    catalogue    the methods as data: what each trains, and at which rates
    comparison   recorded runs, the best rate of each, ranks and confidence
    labelling    methods with a label head, on a task of their own

Start with `catalogue`.
"""
