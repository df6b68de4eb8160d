"""Reports: what is read out of records, and how it is said and drawn. Needs records alone."""
