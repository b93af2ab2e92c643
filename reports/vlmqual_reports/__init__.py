"""Reports: from results files to pages that a person can decide on."""
