"""What a run will take: memory, operations and time, measured on the real modules without their numbers."""
