"""From a trained run and new images to label maps: sliding windows, prediction of files and folders, export."""
