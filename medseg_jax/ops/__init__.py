"""Array operations without parameters: convolution, scans, wavelets, superpixels, components, morphology, CLAHE."""
