"""What every room uses: errors, arguments, files, tables, progress."""
