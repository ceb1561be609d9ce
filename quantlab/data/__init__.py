"""Rows in: texts as blocks of token ids, tasks as documents. Two small data sets ship with the package."""
