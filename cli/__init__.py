"""The commands badam-plan, badam-train and badam-report."""
