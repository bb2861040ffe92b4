"""Pages that a person looks at: self-contained HTML, no server, no network."""
