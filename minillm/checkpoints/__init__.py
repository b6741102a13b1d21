"""Files that are whole or absent: saving in the background, resuming, locks, signals."""
