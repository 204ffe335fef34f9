"""Drawing: frames in, figures out. Imports matplotlib and pandas, never torch or measure."""
