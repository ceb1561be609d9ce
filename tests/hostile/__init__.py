"""Files made to do harm, and what the command line does with them."""
