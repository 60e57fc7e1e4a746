"""Running a schedule on real devices, with torch."""
