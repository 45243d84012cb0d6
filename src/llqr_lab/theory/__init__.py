"""Section 4 and appendix B of the paper, its toys, and the storage of Table 9."""
