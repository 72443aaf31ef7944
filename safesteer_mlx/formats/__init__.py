"""What a run's student is exported to, and how the exported thing is asked what it does."""
