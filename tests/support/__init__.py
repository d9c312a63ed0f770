"""What tests share: fake caches and models, faults of disks and stores, references in float64."""
