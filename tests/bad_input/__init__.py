"""Tables of bad input, one file for each host. test_bad_input.py tries every row."""
