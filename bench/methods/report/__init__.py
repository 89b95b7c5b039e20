"""What the stored rows of the methods benchmark say: figures, tables, pictures, plain words."""
