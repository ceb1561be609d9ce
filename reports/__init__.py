"""reports: records in; tables, pictures and one HTML page out. Needs no torch."""
