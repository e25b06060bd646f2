"""From file lists to batches on the device."""
