"""What every other package uses: records that travel, errors, seeds, statistics, files."""
