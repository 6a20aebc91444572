"""The one reader of rows for all commands: plain text, JSONL, CSV, TSV and Parquet, streamed record by record."""
