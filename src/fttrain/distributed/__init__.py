"""The processes of a stage: how they meet, agree, stop, and have helpers of their own."""
