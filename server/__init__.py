"""What runs in the middle: rounds, evaluation, records, reports and the command line."""
