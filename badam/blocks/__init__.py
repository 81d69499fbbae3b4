"""Which parameters form a block and which block is active: names, partitions, schedules. Imports no torch."""
