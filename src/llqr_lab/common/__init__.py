"""What several rooms of the lab share: statistics, processes, output files, drawing."""
