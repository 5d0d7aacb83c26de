"""One module for each inference engine; each satisfies ``optpipe.types.Backend`` and imports its SDK late."""
