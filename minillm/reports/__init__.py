"""What a run tells people: header and footer, metrics, warnings, pictures, pages."""
