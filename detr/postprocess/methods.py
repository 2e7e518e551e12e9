"""Post-processing as methods of the image processors."""

from detr.postprocess import detection, instance, original, original_panoptic, panoptic, semantic


class PostProcessingMethods:
    """The `post_process*` methods of both image processors.

    They do not use the processor, so they are the functions of `detr.postprocess` as static methods.
    """

    post_process_object_detection = staticmethod(detection.post_process_object_detection)
    post_process_semantic_segmentation = staticmethod(semantic.post_process_semantic_segmentation)
    post_process_instance_segmentation = staticmethod(instance.post_process_instance_segmentation)
    post_process_panoptic_segmentation = staticmethod(panoptic.post_process_panoptic_segmentation)

    post_process = staticmethod(original.post_process)
    post_process_segmentation = staticmethod(original.post_process_segmentation)
    post_process_instance = staticmethod(original.post_process_instance)
    post_process_panoptic = staticmethod(original_panoptic.post_process_panoptic)
