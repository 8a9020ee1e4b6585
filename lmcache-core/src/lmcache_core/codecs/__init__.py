"""The codecs that core brings, each behind an extra."""
